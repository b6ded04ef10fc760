"""The subcommands of `unibiomed`, a file each."""
