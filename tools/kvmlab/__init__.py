"""kvmlab's commands and the harness that judges what a machine did."""
