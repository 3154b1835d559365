"""The sections of a settings file; `fastjepa.config` puts them together."""
