"""A record as a page: tables, markdown, figures, HTML and the dashboard."""
