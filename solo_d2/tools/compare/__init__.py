"""Several models on the same data, in one table: ``python -m solo_d2 compare --help``."""


def main() -> int:
    """The verb."""
    from .cli import main

    return main()
