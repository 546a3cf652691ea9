"""python main.py --config=configs/mnist_kappa.py --workdir=runs/mnist, which is `vaebal run`."""

import sys

from vaebal.run import main

if __name__ == "__main__":
    main(sys.argv)
