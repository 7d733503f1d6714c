"""How encoded rows reach those who learn or answer: cached in the object store, or streamed from their files in order."""
