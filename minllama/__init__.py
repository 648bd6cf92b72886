"""The rooms of minllama; `docs/structure.md` has the map."""
