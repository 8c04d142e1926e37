"""A web page and an HTTP interface to sample from. What imports Gradio is imported by `server` alone.

`choices`    the options of sampling as controls of a form and as parameters of requests
`limits`     what one request may ask for
`shelf`      the models, upsamplers and LoRAs that are offered
`folders`    files named without where they lie
`followers`  who follows which job
`line`       the queue of those who wait
`store`      how much is uploaded and kept, and where
`work`       one job at a time: from a request to pictures
`recall`     the settings in a picture, as the controls take them
`parts`      components for files from strangers
`form`       the controls of the page
`page`       the page
`endpoints`  the HTTP interface
`door`       the password, and how long a wrong one takes
`hosts`      the names that the page answers to
`guard`      what no request may do
`server`     from the first request to the signal that ends it
"""
