"""`python -m fastssl`, which launchers of many processes need."""

from fastssl.cli import main

main()
