"""JSON documents, terminal tables and HTML pages."""
