(() => {
  "use strict";
  const viewer = document.getElementById("viewer");
  const sides = viewer.querySelector(".sides");
  const position = viewer.querySelector("[data-position]");
  const button = (name) => viewer.querySelector(`[data-do="${name}"]`);
  const toggles = ["boxes", "invert"];
  let films = [];
  let at = 0;

  // A copy of the page's own nodes: an image is inline once and never written as markup again.
  function side(film) {
    const figure = document.createElement("div");
    figure.className = "side";
    const picture = document.createElement("div");
    picture.className = "film";
    picture.append(...[...film.children].map((child) => child.cloneNode(true)));
    figure.append(picture, film.parentElement.querySelector(".about").cloneNode(true));
    return figure;
  }

  function show(index) {
    at = index;
    // A hit is only worth a closer look beside what was asked; films[0] is the query.
    sides.replaceChildren(...(at === 0 ? [films[0]] : [films[0], films[at]]).map(side));
    position.textContent = at === 0 ? "Query" : `Query and hit ${at} of ${films.length - 1}`;
    button("previous").disabled = at === 0;
    button("next").disabled = at === films.length - 1;
    for (const name of toggles) {
      button(name).setAttribute("aria-pressed", document.getElementById(name).checked);
    }
  }

  const actions = {
    previous: () => at > 0 && show(at - 1),
    next: () => at < films.length - 1 && show(at + 1),
    close: () => viewer.close(),
  };
  for (const name of toggles) {
    actions[name] = () => {
      document.getElementById(name).click();
      show(at);
    };
  }

  document.addEventListener("click", (event) => {
    const film = event.target.closest("button.film");
    if (film) {
      films = [...document.querySelectorAll(`button.film[data-group="${film.dataset.group}"]`)];
      show(films.indexOf(film));
      viewer.showModal();
    }
    const action = event.target.closest("[data-do]");
    if (action) actions[action.dataset.do]();
  });

  viewer.addEventListener("keydown", (event) => {
    const name = { ArrowLeft: "previous", ArrowRight: "next", b: "boxes", i: "invert" }[event.key];
    if (name && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      actions[name]();
    }
  });

  document.documentElement.dataset.viewer = "ready";
})();
