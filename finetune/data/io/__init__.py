"""Files, tables, shards, archives and downloads -> records, whatever format the records have."""
