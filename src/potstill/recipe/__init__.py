"""From one TOML file to checked stages."""
