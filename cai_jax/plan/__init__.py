"""A run planned before it is paid for: compiled for chips that are not there, with no weights anywhere."""
