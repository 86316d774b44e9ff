"""The search spaces that come with the program; v2_1.toml is the preset named v2.1."""
