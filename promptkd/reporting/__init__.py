"""From result folders to tables, pictures and a report."""
