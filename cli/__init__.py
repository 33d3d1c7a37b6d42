"""The command line: one thin file a command; `render` is the only writer to the terminal.

Installed as `ie.cli`. Nothing here imports torch or transformers at module level, so that help and errors come at once.
"""
