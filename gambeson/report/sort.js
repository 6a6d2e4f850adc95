"use strict";
// A click on a heading sorts its table by that column, numbers from the largest, names from A; the next turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  for (const [column, head] of heads.entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const last = head.getAttribute("aria-sort");
      const rising = last ? last === "descending" : column === 0;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const compared = (a, b) => (column ? value(a) - value(b) : value(a).localeCompare(value(b), "en", { numeric: true }));
      const rows = [...table.tBodies[0].rows].sort((a, b) => (rising ? compared(a, b) : compared(b, a)));
      table.tBodies[0].append(...rows);
    });
  }
}
