"""Files, tables, shards, archives and downloads -> records and images; io knows no format of records."""
