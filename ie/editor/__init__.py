"""Editors: what turns an edit request's signals into a low-rank update."""

from ie.editor.editor import Editor, EditorSettings
from ie.editor.files import EditorInfo, load_editor, save_editor
from ie.editor.request import EditRequest

__all__ = ["EditRequest", "Editor", "EditorInfo", "EditorSettings", "load_editor", "save_editor"]
