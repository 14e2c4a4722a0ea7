"""`python -m molecli` is `mole`: what `accelerate launch -m molecli` starts."""

from molecli.cli.app import main

if __name__ == "__main__":
    main()
