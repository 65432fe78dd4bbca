"""What a repository is: keys, packs, maps, image sets, and their upkeep."""
