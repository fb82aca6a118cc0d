"""What people look at: tables, pages and pictures of data and runs."""
