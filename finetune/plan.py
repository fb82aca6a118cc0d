def resident_bytes(m): return m.total
