"""Train, evaluate, export: `python train.py --help`."""

if __name__ == "__main__":  # the tokenising workers import this file: keep torch out of them
    from leanbert.cli import main

    main()
