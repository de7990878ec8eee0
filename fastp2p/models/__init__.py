"""Models: networks, objective and step of each, and what they share."""
