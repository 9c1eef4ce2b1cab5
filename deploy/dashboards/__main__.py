"""Write dashboards, alerts and the tables of the documentation."""

from __future__ import annotations

from .generated import ROOT, generated_files


def main() -> None:
    for path, text in generated_files().items():
        target = ROOT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
