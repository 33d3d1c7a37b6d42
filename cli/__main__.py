"""`python -m ie.cli`: the command as a module, as `torchrun -m` and `accelerate launch -m` start it."""

from .app import main

main()
