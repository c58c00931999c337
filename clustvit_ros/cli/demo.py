"""`clustvit-ros demo` (being written)."""


def add_parser(commands):
    pass
