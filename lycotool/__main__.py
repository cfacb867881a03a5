"""``python -m lycotool``."""

from lycotool.cli import main

if __name__ == "__main__":
    main()
