"""Pages, panels, plots and statistics of finished runs."""
