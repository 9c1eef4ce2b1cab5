"""How a pass is laid out for kernels that read pages themselves."""

from __future__ import annotations

from treecast.kernels.tables import (
    HEADER_COLUMNS,
    ITEM_COLUMNS,
    ROW_COLUMNS,
    Tiling,
    build_tables,
    count_items,
    split_pages,
)

from .bed import Text, layouts_of

COMB = [-1, 0, 1, 0]


def test_a_row_knows_its_place_and_whom_it_sees() -> None:
    (layout,) = layouts_of([Text(3, COMB, num_rows=2)])
    tables = build_tables([layout], Tiling(tile_rows=8, split_pages=4))
    rows = tables.words[tables.rows_at :][: 2 * ROW_COLUMNS].reshape(2, -1)
    assert rows[:, 0].tolist() == layout.places[5:7]
    assert rows[:, 1].tolist() == [2, 1]
    assert [int(tables.words[at]) for at in rows[:, 2]] == [0b0111, 0b1001]
    header = tables.words[rows[0, 6] :][:HEADER_COLUMNS]
    assert header[:2].tolist() == [3, 4]
    assert tables.words[header[3] :][:4].tolist() == [0, 1, 2, 1]


def test_items_cover_every_page_of_every_tile() -> None:
    layouts = layouts_of([Text(300, [-1] * 5), Text(10, [-1])])
    tiling = Tiling(tile_rows=2, split_pages=2)
    tables = build_tables(layouts, tiling)
    items = tables.words[: tables.rows_at].reshape(-1, ITEM_COLUMNS)
    assert len(items) == count_items(layouts, tiling) == 3 * 3 + 1
    for first_row, num_rows in ((0, 2), (2, 2), (4, 1)):
        pages = [
            page
            for item in items
            if (item[0], item[1]) == (first_row, num_rows)
            for page in range(item[3], item[4])
        ]
        assert pages == list(range(5))


def test_aligned_items_hold_whole_committed_pages_at_fixed_positions() -> None:
    layouts = layouts_of([Text(64 * 5 + 63, [-1, 0])])
    tables = build_tables(layouts, Tiling(tile_rows=4, split_pages=2, aligned=True))
    items = tables.words[: tables.rows_at].reshape(-1, ITEM_COLUMNS)
    assert items[:, 3:].tolist() == [[0, 2], [2, 4], [4, 5]]


def test_room_that_is_left_belongs_to_nobody() -> None:
    layouts = layouts_of([Text(10, [-1])])
    tables = build_tables(layouts, Tiling(4, 4), num_items=3, num_rows=2)
    assert tables.words[ITEM_COLUMNS : 3 * ITEM_COLUMNS].tolist() == [0] * 2 * ITEM_COLUMNS
    assert tables.words[tables.rows_at + ROW_COLUMNS :][:ROW_COLUMNS].tolist() == [-1] + [0] * 6


def test_pages_are_split_so_that_a_device_is_filled() -> None:
    layouts = layouts_of([Text(64 * 64, [-1])])
    assert split_pages(layouts, tile_rows=16, programs=16) == 5
    assert split_pages(layouts, tile_rows=16, programs=1000) == 1


def test_a_path_lists_the_places_behind_the_whole_pages() -> None:
    (layout,) = layouts_of([Text(66, COMB)])
    tables = build_tables([layout], Tiling(8, 4), paths=True)
    rows = tables.words[tables.rows_at :][: 4 * ROW_COLUMNS].reshape(4, -1)
    for row, slots in enumerate(([66], [66, 67], [66, 67, 68], [66, 69])):
        path = tables.words[rows[row, 2] :][: 2 + len(slots)].tolist()
        assert path == [layout.places[slot] for slot in (64, 65, *slots)]
