"""The commands of the command line, one module each.

A module offers ``add_parser(subparsers)``, which adds its options, and ``run(args) -> int``, which does
the work and returns the exit code. Nothing heavy is imported at the top of a module, so that
``kglmatch --help`` is quick. `kglmatch.cli.COMMANDS` lists the modules.
"""
