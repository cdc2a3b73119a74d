"""`python -m sglang_nsa.minisgl ...`: mini-sglang's server and its arguments."""

from .launch import main

if __name__ == "__main__":
    main()
