"""The scoring presets, one TOML file each."""
