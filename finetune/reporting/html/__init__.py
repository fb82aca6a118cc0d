"""The pages: each a module, a template and a script of one name."""
