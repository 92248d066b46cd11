"""How libraries come to know converted models.

classes       the `sparsek_<type>` classes, derived from a family's own
tables        everything that libraries look up by model_type, class or class name
after_import  acting on a library when it is imported
"""
