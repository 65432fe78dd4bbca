"""One file a verb; each has `command`, which `imager.cli.main` imports when the verb is called."""
