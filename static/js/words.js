// The scripts' own texts in the language of the page, which the page carries in `#words` (app/web/templates.py).

const told = document.getElementById("words");
const words = told ? JSON.parse(told.textContent) : {};

/** `message` in the language of the page, with `%(name)s` replaced by `values`. */
export function _(message, values = {}) {
  return (words[message] || message).replace(/%\((\w+)\)s/g, (whole, name) => (name in values ? String(values[name]) : whole));
}
