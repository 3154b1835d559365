"""Every operation as torch sees it: schema, shapes, gradient. Importing a module registers its operations."""
