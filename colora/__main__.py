"""``python -m colora`` and the ``colora`` command."""

from colora.cli import main

if __name__ == "__main__":
    main()
