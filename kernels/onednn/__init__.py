"""Intel's oneDNN: `backend` runs layers, `api` is a thin ctypes layer over its C API, `library` finds it."""
