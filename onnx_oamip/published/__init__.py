"""Published systems that are not the default path, as plug-ins."""
