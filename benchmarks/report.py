"""x."""


def add_arguments(p: object) -> None:
    pass


def run(a: object) -> int:
    return 0
