"""`python -m fastssl`, which launchers of many processes need."""

from fastssl.commands.main import main

main()
