"""Three uses of the starter kit: sorting documents, translating a file, asking a database."""
