// The theme button, then every section from top to bottom.

function theme() {
  const button = document.getElementById("theme");
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  let dark = preferred.matches;
  const apply = (fixed) => {
    if (fixed) document.documentElement.style.colorScheme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", dark);
  };
  button.addEventListener("click", () => {
    dark = !dark;
    apply(true);
  });
  preferred.addEventListener("change", () => {
    dark = preferred.matches;
    apply(document.documentElement.style.colorScheme !== "");
  });
  apply(false);
}

theme();
headline();
losses();
errors();
experts();
layerDetails();
made();
