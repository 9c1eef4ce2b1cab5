(() => {
  "use strict";
  const all = (selector) => [...document.querySelectorAll(selector)];
  const rounds = all("article.round");
  if (!rounds.length) return;
  const pieces = all(".piece"), bars = all(".clock.whole .bar");
  const position = document.getElementById("position");
  const previous = document.getElementById("previous"), next = document.getElementById("next");
  let current = 0;

  // One round is shown at a time; without this script all of them are.
  const show = (number, follow) => {
    current = Math.min(rounds.length, Math.max(1, number));
    const here = String(current);
    for (const round of rounds) round.hidden = round.dataset.round !== here;
    for (const mark of [...pieces, ...bars])
      mark.classList.toggle("current", mark.dataset.round === here);
    for (const piece of pieces)
      piece.dataset.round === here ? piece.setAttribute("aria-current", "true") : piece.removeAttribute("aria-current");
    position.textContent = `${current} of ${rounds.length}`;
    previous.disabled = current === 1;
    next.disabled = current === rounds.length;
    if (follow) history.replaceState(null, "", `#round-${current}`);
  };

  const fromHash = () => Number((/^#round-(\d+)$/.exec(location.hash) || [])[1] || 0);
  const best = () => {
    const counts = pieces.map((piece) => Number((/heat(\d)/.exec(piece.className) || [])[1]));
    return 1 + counts.indexOf(Math.max(...counts));
  };

  for (const mark of [...pieces, ...bars]) {
    const number = Number(mark.dataset.round);
    mark.addEventListener("click", (event) => { event.preventDefault(); show(number, true); });
  }
  // Not the bars: they stand below the round, whose height moves them.
  for (const piece of pieces) {
    const number = Number(piece.dataset.round);
    piece.addEventListener("mouseenter", () => show(number, false));
    piece.addEventListener("focus", () => show(number, true));
  }
  previous.addEventListener("click", () => show(current - 1, true));
  next.addEventListener("click", () => show(current + 1, true));
  window.addEventListener("hashchange", () => fromHash() && show(fromHash(), false));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.target.closest && event.target.closest(".scroll")) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(current + step, true);
    if (event.target.classList.contains("piece")) pieces[current - 1].focus();
  });
  document.querySelector("nav.steps").hidden = false;
  document.documentElement.classList.add("one-by-one");
  show(fromHash() || best(), false);
})();
