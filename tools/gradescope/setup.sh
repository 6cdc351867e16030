#!/bin/bash
# Gradescope runs this once, as root, when it makes the image of the autograder. The kernel of the emulated machines
# comes in the zip: Gradescope's images are Ubuntu, which does not have the package. The lesson's run proves the image.
set -eu
cd "$(dirname "$0")/kvmlab"

tools/setup run svm vmx grade
make --no-print-directory run LESSON=1 ENGINE=svm
