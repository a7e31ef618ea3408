"""Speed beside other runtimes and beside the papers' tables; an extra that the core never imports."""
