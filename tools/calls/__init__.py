"""The calls that ``tools/digest.py`` makes: generators of names and functions without arguments.

Only public names are used, and the fields of results are named one by one, so that one may be added.
What tells the time is left out.
"""
