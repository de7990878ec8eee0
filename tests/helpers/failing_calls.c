// Fails the n-th call that writes below one folder, for tests/helpers/failing_writes.py: preloaded into a process, armed by it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long first, last;         // calls that fail, counted from 1; none where 0
static int failure;              // errno; 0 to kill the process
static atomic_long count;        // of calls below the folder
static char failed[PATH_MAX + 64];  // the first that did, in words

void fail_calls(const char *below, long from, long to, int with) {
    snprintf(folder, sizeof folder, "%s", below);
    first = from, last = to, failure = with;
    atomic_store(&count, 0);
}

long calls_counted(void) { return atomic_load(&count); }

const char *call_failed(void) { return failed; }

// Whether this call is one to fail; a process that is to be killed returns -1 here, so that it may do half of it.
static int strike(const char *name, const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    long n = atomic_fetch_add(&count, 1) + 1;
    if (n < first || n > last) return 0;
    if (!failed[0]) snprintf(failed, sizeof failed, "%s %s", name, path + strlen(folder));
    if (failure == 0) return -1;
    errno = failure;
    return 1;
}

static void stop(void) { kill(getpid(), SIGKILL); }

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, buffer, PATH_MAX - 1);
    if (n < 0) return NULL;
    buffer[n] = 0;
    return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define STRIKE(name, path)                     \
    do {                                       \
        int hit = strike(name, path);          \
        if (hit < 0) stop();                   \
        if (hit) return -1;                    \
    } while (0)

#define OPEN(name)                                                    \
    int name(const char *path, int flags, ...) {                      \
        va_list rest;                                                 \
        va_start(rest, flags);                                        \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;     \
        va_end(rest);                                                 \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT)) STRIKE("open", path); \
        return REAL(name)(path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                  \
    int name(int at, const char *path, int flags, ...) {              \
        va_list rest;                                                 \
        va_start(rest, flags);                                        \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;     \
        va_end(rest);                                                 \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT)) STRIKE("open", path); \
        return REAL(name)(at, path, flags, mode);                     \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *content, size_t size) {
    char buffer[PATH_MAX];
    int hit = folder[0] ? strike("write", path_of(fd, buffer)) : 0;
    if (hit < 0) {
        REAL(write)(fd, content, size / 2);
        stop();
    }
    return hit ? -1 : REAL(write)(fd, content, size);
}

int fsync(int fd) {
    char buffer[PATH_MAX];
    STRIKE("fsync", path_of(fd, buffer));
    return REAL(fsync)(fd);
}

int rename(const char *from, const char *to) {
    STRIKE("rename", to);
    return REAL(rename)(from, to);
}

int unlink(const char *path) {
    STRIKE("unlink", path);
    return REAL(unlink)(path);
}

int mkdir(const char *path, mode_t mode) {
    STRIKE("mkdir", path);
    return REAL(mkdir)(path, mode);
}
