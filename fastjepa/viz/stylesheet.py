"""How the page looks: light or dark as the reader's system is, one column on a phone."""

CSS = """
:root { --ground: #fbfbfa; --card: #ffffff; --ink: #1f2328; --soft: #656d76; --line: #dcdfe3; --bar: #2f7fc1;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --card: #1b1f24; --ink: #e4e7ea; --soft: #98a1ab; --line: #30363d; --bar: #4a96d6; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 0 0 .3rem; letter-spacing: -.005em; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .2rem 0 .8rem; max-width: 46rem; }
section > p { color: var(--soft); }
section { border-top: 1px solid var(--line); margin-top: 2.2rem; padding-top: 1.6rem; }
.chips { margin: 0 0 .7rem; }
.chip { display: inline-block; color: #fff; border-radius: 999px; padding: .1rem .75rem; margin-right: .45rem;
  font-size: .85rem; font-weight: 600; }
.lead { font-size: 1.05rem; }
.note { border-left: 3px solid #d19a1f; padding: .3rem .8rem; margin: 1rem 0 0; background: var(--card);
  max-width: none; overflow-wrap: anywhere; }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; margin: 1rem 0; }
.bar span { display: block; height: 100%; background: var(--bar); }
.figures { display: flex; flex-wrap: wrap; gap: .7rem 2.2rem; margin: 0; }
.figures dt { color: var(--soft); font-size: .8rem; }
.figures dd { margin: 0; font-size: 1.05rem; font-variant-numeric: tabular-nums; }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 1rem; }
.large { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1rem; }
.wide { grid-column: 1 / -1; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem;
  min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.small figure img { width: 100%; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .7rem; max-width: 52rem; }
.scrolled { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem; }
th, td { text-align: left; padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; white-space: pre-line; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.path { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem; }
.groups { columns: 20rem; column-gap: 2.5rem; }
.groups table { break-inside: avoid; width: 100%; margin: 0 0 .9rem; }
.groups th { width: 42%; overflow-wrap: anywhere; white-space: normal; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
ul { padding-left: 1.1rem; overflow-wrap: anywhere; font-size: .92rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
footer { color: var(--soft); font-size: .85rem; margin-top: 2.5rem; }
@media (max-width: 640px) { main { padding: 1.25rem .8rem 2rem; } h1 { font-size: 1.5rem; } figure { padding: .5rem; } }
"""
