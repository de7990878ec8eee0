"""Everything that can be compiled and fetched without a GPU, made here, carried, and unpacked on a machine with one.

    python benchmarks/gpu_cache.py make            # make gpu-cache: on the GPU machine's Python, torch and Triton
    python benchmarks/gpu_cache.py unpack DIR      # there; prints what to export

`make` leaves in .gpu-cache/ an archive of the Triton programs of a training step, of the tuner's candidates and of the
tests that run on a GPU, compiled for an H100 or H200; a wheel of fastp2p with its CUDA extension; the wheels that such
a machine lacks; and a manifest, written last. What it compiled stays in build/gpu-cache/, so that the next one compiles
only what has changed. `unpack` needs the standard library alone, and refuses what was made of other sources or for
another Triton, since nothing of it would be found there.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.machine import ROOT, commit

FOLDER = ROOT / ".gpu-cache"
WORK = ROOT / "build" / "gpu-cache"
MANIFEST, FORMAT = "manifest.json", 1
MOST_BYTES = 40_000_000  # the archive may have
# What `fastp2p train` needs and a machine with PyTorch's and pytest's usual companions lacks
WHEELS = ["tyro", "docstring_parser", "typeguard", "typing_extensions"]


class Stale(Exception):
    """The cache is of other sources or for other software than what it is asked for, or there is none."""


def sources(root: Path) -> Iterator[Path]:
    """What programs and wheel are made of."""
    for folder, pattern in (("kernels", "*.py"), ("fastp2p", "*.py"), ("csrc", "*.*")):
        yield from sorted(path for path in (root / folder).rglob(pattern) if path.is_file())
    yield from (root / "pyproject.toml", root / "setup.py")


def digest(root: Path) -> str:
    """One number for all sources: equal for equal names and contents."""
    sha = hashlib.sha256()
    for path in sources(root):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        sha.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return sha.hexdigest()[:16]


# Where there is a GPU


def unpack(folder: Path, into: Path, root: Path = ROOT) -> dict[str, str]:
    """Install what `make` left, for processes of this machine.

    Args:
        folder: .gpu-cache, as it was carried here.
        into: a folder of its own, made if need be.
        root: the checkout whose programs are to be run.

    Returns:
        What to put into such a process's environment.

    Raises:
        Stale: when there is no whole cache, or it is of other sources or for another Triton. Nothing is written then.
    """
    manifest = read_manifest(folder)
    here = {"sources": digest(root), "triton": importlib.metadata.version("triton")}
    made = {name: manifest[name] for name in here}
    if made != here:
        differ = "; ".join(f"{name} {made[name]}, here {here[name]}" for name in here if made[name] != here[name])
        raise Stale(f"{folder}: made at commit {manifest['commit']} for {differ}: run make gpu-cache again")
    archive = folder / manifest["archive"]
    content = archive.read_bytes() if archive.is_file() else b""
    if hashlib.sha256(content).hexdigest() != manifest["archive_sha256"]:
        raise Stale(f"{archive}: is not the file of {len(content)} bytes that the manifest names: carry it here again")

    cache, site = into.absolute() / "triton", into.absolute() / "site"
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):  # Triton keeps the absolute paths of a program's files
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    for name in manifest["wheels"]:  # none of them has a part that pip would put elsewhere
        with zipfile.ZipFile(folder / name) as wheel:
            wheel.extractall(site)
    # A safe path leaves a script's own folder out, so the benchmarks could not find one another
    benchmarks = [str(root / folder) for folder in ("benchmarks", "benchmarks/ops")]
    paths = [str(site), *benchmarks, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONSAFEPATH": "1",
        # The cache is of the very same sources; results look at this where there is no repository
        "FASTP2P_COMMIT": os.environ.get("FASTP2P_COMMIT", manifest["commit"]),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `make` wrote. Raises Stale where there is none of this format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise Stale(
            f"{path}: there is none: run make gpu-cache where there is a network, and carry {folder}"
        ) from error
    except ValueError as error:
        raise Stale(f"{path}: is damaged: {error}: run make gpu-cache again") from error
    if manifest.get("format") != FORMAT:
        raise Stale(f"{path}: got format {manifest.get('format')}, expected {FORMAT}: run make gpu-cache again")
    return dict(manifest)


# Where there is none


def make(extension: str, what: list[str]) -> None:
    """Build the wheel of a copy of the sources, then let a process that runs on it compile."""
    WORK.mkdir(parents=True, exist_ok=True)
    lock = (WORK / "lock").open("w")  # held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another make gpu-cache in {WORK}", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    tree = snapshot()
    site = WORK / "site"
    shutil.rmtree(site, ignore_errors=True)
    wheels = [build_wheel(tree, extension), *fetch_wheels()]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    about = {"commit": made_at(), "sources": digest(tree), "extension": extension, "wheels": [str(w) for w in wheels]}
    paths = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "benchmarks")]), "PYTHONSAFEPATH": "1"}
    environment = {**os.environ, **paths, "TRITON_CACHE_DIR": str(WORK / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}
    command = [sys.executable, __file__, "compile", json.dumps(about), *what]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(code)


def snapshot() -> Path:
    """A copy of what the wheel is made of: others may edit the checkout meanwhile. Times stay, for ninja."""
    tree = WORK / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("fastp2p", "kernels", "csrc"):
        shutil.rmtree(tree / name, ignore_errors=True)
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    for library in (tree / "build").glob("lib*"):  # a module that is no more would come along
        shutil.rmtree(library)
    return tree


def build_wheel(tree: Path, extension: str) -> Path:
    """fastp2p's."""
    folder = WORK / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "FASTP2P_BUILD": extension, "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder), str(tree)]
    began = time.monotonic()
    if subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(
            f"the wheel with FASTP2P_BUILD={extension} was not built: the reason is above. --extension none leaves "
            "the extension out: Triton serves every operator then"
        )
    (wheel,) = folder.glob("*.whl")
    print(f"{wheel.name} with FASTP2P_BUILD={extension}: {time.monotonic() - began:.0f} s", flush=True)
    return wheel


def fetch_wheels() -> list[Path]:
    """Download the packages that lack there, in the versions of constraints.txt, unless they are here."""
    folder, constraints = WORK / "wheels", ROOT / "constraints.txt"
    wanted = hashlib.sha256(f"{WHEELS} {sys.version_info[:2]} {constraints.read_text()}".encode()).hexdigest()
    stamp = folder / "stamp"
    if not (stamp.exists() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--constraint", str(constraints), "--dest", str(folder), *WHEELS]
        subprocess.run(command, check=True)
        stamp.write_text(wanted)
    return sorted(folder.glob("*.whl"))


def made_at() -> str:
    """The checkout's commit, with -dirty where a file of it was changed since; as FASTP2P_COMMIT has it."""
    here = commit()
    return (here["commit"] or "unknown")[:12] + "-dirty" * bool(here["dirty"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--extension", choices=["cuda", "none"], default="cuda", help="of the wheel (default: cuda)")
    making.add_argument("--only", nargs="+", default=[], choices=["step", "tuner", "tests"], help="default: all")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("into", type=Path)
    unpacking.add_argument("--folder", type=Path, default=FOLDER)
    compiling = commands.add_parser("compile")  # by make, in a process of its own
    compiling.add_argument("about", type=json.loads)
    compiling.add_argument("only", nargs="*")
    args = parser.parse_args()
    if args.command == "make":
        make(args.extension, args.only)
    elif args.command == "compile":
        from gpu_programs import compile_and_pack

        compile_and_pack(FOLDER, WORK, args.about, args.only)
    else:
        try:
            added = unpack(args.folder, args.into)
        except Stale as error:
            sys.exit(str(error))
        except OSError as error:
            sys.exit(f"{args.into}: cannot be written to: {error}; choose another folder")
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in added.items()))


if __name__ == "__main__":
    main()
